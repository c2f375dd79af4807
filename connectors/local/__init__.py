"""Local servers of Discord and Slack, for tests and for `kibitz bench connectors`."""
