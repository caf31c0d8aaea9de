"""How good a reply is: graders as OpenAI has them, run over the models of the catalog. `graders.py` is the way in."""
