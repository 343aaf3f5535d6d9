"""`zopro bench step`: what a policy step costs beside the forward passes it cannot do without, and beside TRL.

zopro bench step --model gemma-3-270m --peer trl
"""
