"""Which layers should remove how many tokens: plans found on images that the model was trained on.

written      budgets and families of plans, as users write them
space        the plans of a method, and the one that removes the most
price        what a plan costs: token-layers, operations, milliseconds
walk         many plans on the same images, computing what they share once
judge        how far a plan leads a model away from what it says with all tokens
similarity   where tokens have a double
greedy       from all tokens down, step by step
evolution    from good plans to better ones at the same cost
subject      a trained model with images to search on, and those held out
finder       all of it for a budget
compared     what is found beside the uniform strategies
answer       a plan as settings of a run
family       the plans of a family
tuning       the most that a family can remove within a margin
"""
