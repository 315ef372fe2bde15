"""Group relative policy optimization: advantages, loss, optimizer and the jitted step."""
