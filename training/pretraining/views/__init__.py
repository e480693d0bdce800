"""What student and teacher see: crops, masks and neighbouring slices, each a pure function of a random generator."""
