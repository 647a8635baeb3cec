"""Examples of the ops inside other people's trainers; each is a few lines, to copy and change."""
