"""What trainers can hold on to; each module needs its trainer, and is imported by its own name."""
