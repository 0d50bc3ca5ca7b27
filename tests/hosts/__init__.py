"""Several hosts on one machine, with a network of their own."""
