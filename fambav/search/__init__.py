"""Which layers should remove how many tokens: plans searched for on training images.

parsing         budgets and families of plans, as users write them
space           the plans of a method, and how a plan is brought within a budget
cost_models     what a plan costs: token-layers, operations, milliseconds
objective       how far a plan moves a model's predictions from those with all tokens
greedy          step by step from all tokens down
evolution       from good plans to better ones at the same cost
budget_search   all of it for a budget
baselines       uniform strategies beside a plan, on held-out images
tuning          the most that a family can remove within a margin
plan_file       a plan as settings of a run
subject         a trained model with images to search on, and those held out
"""
