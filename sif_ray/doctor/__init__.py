"""What is wrong with a machine, an installation, a cluster or a request, said before hours are spent on it."""
