"""One head on an encoder, frozen or trained with it."""
