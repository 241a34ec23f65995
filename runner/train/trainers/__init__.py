"""TRL's trainers with what every run needs: settings, callbacks, loss guard, checkpoints, held-out loss."""
