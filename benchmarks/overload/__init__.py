"""What clients get when many more come than the pipeline can serve."""
