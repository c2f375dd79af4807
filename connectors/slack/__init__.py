"""The Slack connector: mentions, threads, direct messages; native streams, buttons, reactions; Socket Mode or HTTP."""
