"""What happens at a fork: noticing it, holding it back, and taking over in the child."""
