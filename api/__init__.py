"""What users touch: the command line, the HTTP front end and the engine that schedules requests."""
