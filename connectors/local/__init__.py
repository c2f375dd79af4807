"""A Discord and a Slack on this machine, for tests and for `kibitz bench connectors`."""
