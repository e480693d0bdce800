"""What each idea of the method is worth: the design, how encoders are evaluated, the page."""
