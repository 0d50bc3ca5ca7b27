"""Every option, with its default, its help and its environment variable."""
