"""RunPod, the first provider: its API, offers, prices, volumes and serverless endpoints."""
