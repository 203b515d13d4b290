"""Floor 3: who runs when. No torch, no HTTP; speaks to the `Backend` protocol only."""
