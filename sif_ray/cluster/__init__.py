"""Manifests for KubeRay, made from the configurations that the jobs read, and what is wrong with such manifests."""
