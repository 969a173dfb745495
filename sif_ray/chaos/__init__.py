"""What the system promises when parts of it fail, and how that is tried."""
