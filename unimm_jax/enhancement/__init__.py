"""Self-enhancing alignment (ILLUME, Figure 5): the model draws, a judge assesses, stage 3 learns the assessments."""
