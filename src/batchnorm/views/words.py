"""What the arms are called in pictures and tables."""

ARM_NAMES = {
    "none": "without BN",
    "batch": "with BN",
    "batch-torch": "with torch.nn's BN",
    "batch-note": "with the note's BN",
    "group": "with group norm",
    "layer": "with layer norm",
}
