"""The Ray Serve application: an image and a question in, a checked trace out."""
