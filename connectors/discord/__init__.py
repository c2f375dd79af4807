"""The Discord connector: mentions, replies, threads and direct messages; buttons, reactions, slash commands."""
