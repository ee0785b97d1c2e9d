"""Model builders, with torchtune's signatures."""
