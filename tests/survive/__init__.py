"""Real programs, unmodified, that must come to the same result with too little memory."""
