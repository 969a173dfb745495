"""SIFThinker (spatially aware image focus) as a Ray-distributed RL system."""

__version__ = "0.1.0"
