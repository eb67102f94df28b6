"""Two models, and twins, on the same matched prompts: is it alignment, or just different words?"""
