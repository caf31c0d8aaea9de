"""What stands on the other side of the wire: examples, recipes, the demo. Speaks HTTP only; imports nothing of the gateway."""
