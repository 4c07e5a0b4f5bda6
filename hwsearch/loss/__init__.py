"""What each choice loses: sensitivities, measured in torch."""
