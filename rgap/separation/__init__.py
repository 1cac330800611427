"""The images of a batch told apart in the fully connected layers."""
