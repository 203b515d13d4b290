"""Floor 1: what comes in becomes numbers: text to token ids and back, chat templates. No torch."""
