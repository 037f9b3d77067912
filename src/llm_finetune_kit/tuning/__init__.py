"""A search over settings by held-out loss: many ordinary runs under one folder, and which settings did best."""
