"""Lightning's path for one thing that programs ask for without a Trainer: which devices it would take."""
