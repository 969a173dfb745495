"""What a run needs before it starts: the policy's size, the memory of every GPU, the place of every actor."""
