"""The command line `galaxyline`: a group of commands, each in a file of its name."""
