"""What front end and engine say to each other, and how it lies on the wire."""
