"""The engine's process: it joins the scheduler to the pipeline, and measures both."""
