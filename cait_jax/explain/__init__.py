"""What a network sees: attention as maps, attribution, how far to trust it, and figures of them."""
