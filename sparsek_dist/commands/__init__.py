"""What each sub-command does, in terms of the floors below: the only place where they all meet."""
