"""The attach stage: adapters on facades, and what makes them fast."""
