"""Reasoning with process rewards: scorers (text -> ids and positions -> scores), `svpo score`, export for serving."""
