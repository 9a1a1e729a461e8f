"""Training: one visible loop (trainer.py) and the parts it calls, one file each."""
