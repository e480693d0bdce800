"""One loss, one file. Letters: B images, G global crops, L local crops, M masked patches, D width, K prototypes."""
