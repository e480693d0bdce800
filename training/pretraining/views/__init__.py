"""What student and teacher see: crops, masks and neighboring slices, each a pure function of a random generator."""
