"""Writes the demo's skill files beside this script: eight skills of a household assistant, some 300 examples.

One rule: every argument value stands in its request word for word, and in no other example, so that any example can
be held out and only copying can get it right. Run once: `python clients/recipes/demo_skills/make.py`.
"""

from __future__ import annotations

import random
from pathlib import Path


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


CITIES = lines("""
Reykjavik
Kathmandu
Wolverhampton
Zanzibar
Tromsdalen
Ulverston
Santa Rosalia
Bratislava
Marrakesh
Novosibirsk
Little Wenlock
Timbuktu
Guadalajara
Ouagadougou
Eskilstuna
Fort Brannigan
Szczecin
Yellowknife
Mombasa
Upper Tilling
Vladivostok
Quedlinburg
Port Moresby
Ljubljana
Castelbuono
Winnipeg
Rovaniemi
Kilmarnock
Sarajevo
Albuquerque
Dunwich
Tashkent
Whitehorse
San Quirico
Bexhill
Oamaru
Gdansk
Paramaribo
East Grimley
Tallinn
Honolulu
Nether Poppleton
Cordoba
Trondheim
""")
PEOPLE = lines("""
Harriet Quill
Doctor Mbeki
Uncle Ferdinand
Bartholomew
Granny Plum
Xavier Ortega
Mrs Pennyworth
Siobhan
Captain Rusk
Ludmila
my cousin Terrence
Professor Okonkwo
Jasper Thistle
Aunt Philippa
Zebedee
Ingrid Halvorsen
the plumber
Mister Tanager
Rosalind Achebe
Desmond
Coach Varga
Wilhelmina
the night nurse
Old Barnaby
Yolanda Prince
Theodore
Nurse Abernathy
Gwendolyn
Rafael Moreno
Clementine Yu
the vet on Ash Lane
Mortimer
Beatrix Lowe
Sergeant Doyle
Fatima Rahimi
Cornelius
Magnus Iverson
Aunt Eudora
the landlady
Sebastian
Doctor Kaplan
Henrietta
Uncle Bram
Imogen Vale
""")
TITLES = lines("""
Midnight Ferry
The Copper Waltz
Seven Lanterns
Ode to a Toaster
Winter in Valparaiso
Dusty Highway Blues
Marzipan
Echoes of Tomorrow
The Tin Drummer
Saltwater Hymn
Moonbeam Tango
Paper Tigers
Velvet Thunder
Goodnight Caroline
The Lighthouse Reel
Purple Umbrella
Wandering Jane
Electric Meadow
Bonfire Lullaby
Crooked Mile
Sapphire Nights
Hopscotch
The Baker's Daughter
Rattlesnake Polka
Halfway to Memphis
Golden Sparrow
Kingdom of Rust
Summer Static
Barefoot Serenade
Nine Candles
The Last Tram
Whispering Pines
Cinnamon Girl Returns
Orbit
Feathers and Lead
Hurricane Lucy
Tangled Strings
The Clockmaker
Raspberry Rain
Northbound
Letter to Lisbon
Silver Bicycle
Old Harbour Jig
Gravity
""")
ITEMS = lines("""
oat flakes
a dozen eggs
washing powder
peppermint tea
dark chocolate
cat litter
olive oil
two lemons
toothpaste
brown sugar
frozen peas
a sack of potatoes
lightbulbs
goat cheese
paper towels
coconut milk
sunflower seeds
shampoo
red onions
baking soda
smoked paprika
dog biscuits
a fresh baguette
matches
sparkling water
maple syrup
wholemeal flour
batteries
strawberry yoghurt
parsley
bin liners
vanilla ice cream
chickpeas
a birthday card
rubber gloves
apricot jam
black pepper
a pint of cream
sandpaper
green olives
kitchen foil
plum vinegar
cough drops
two cucumbers
""")
TASKS = lines("""
feed the goldfish
defrost the chicken
renew my library card
descale the coffee machine
fetch the dry cleaning
prune the hedge
back up the laptop
send the tax return
sharpen the kitchen knives
vacuum the staircase
collect the theatre tickets
rotate the tyres
bleed the radiators
return the borrowed ladder
polish my boots
top up the parking meter
ring the dentist
unload the dishwasher
sew on the missing button
practise the cello
weed the flower beds
refill the bird feeder
cancel the gym membership
turn off the sprinkler
proofread the essay
hang up the curtains
bring in the garden chairs
wash the dog's blanket
stretch my back
pack a raincoat
sign the permission slip
oil the squeaky hinge
empty the letterbox
take my vitamins
water Mabel's orchids
buy a wedding gift
tidy the attic
order new spectacles
mend the puncture
walk to the chemist
rinse the paint brushes
bake the bread rolls
draft the invitation
close the greenhouse
""")
RECIPIENTS = lines("""
Nathaniel
Priscilla
the landlord
Hamish McTavish
Octavia
Joaquin
my brother Rupert
Lady Fenwick
Esmeralda
the babysitter
Tobias Klein
Geraldine
Mr Szymanski
Kofi
the book club
Annelise
Leopold
Marguerite
Duncan Frost
the choir
Penelope Hart
Ezekiel
Svetlana
our neighbour Bert
Constance
Ignatius
Rukmini
the school office
Florian
Tabitha Crane
Maximilian
Aoife
Grandpa Joe
Lucinda
Benedict
Mei Ling
Humphrey
Sister Agatha
Dimitri Volkov
the caretaker
Rosemary
Alasdair Munro
Cousin Hilda
Jocelyn
""")
TEXTS = lines("""
the boiler is broken again
I will be ten minutes late
dinner is ready
the keys are under the mat
we are out of coffee
happy anniversary
the train has been delayed
bring your swimming trunks
I found your spectacles
see you at the stadium
the puppy ate my slippers
rehearsal starts early
please park round the back
I cannot come to the picnic
the soup needs more pepper
good luck with the exam
your parcel is in the porch
call me when you land
the meeting moved upstairs
I passed my driving test
do not forget the sandwiches
the electrician is coming
we won the quiz
my phone is nearly flat
thanks for the marmalade
the cat is back
practice is cancelled
I left my scarf at yours
the roof is leaking
wear something blue
the tent is already up
we named her Juniper
the bridge is closed
save me a seat
the rabbits have escaped
I owe you five pounds
the kettle has gone missing
lunch is on me
I am stuck in the lift
the parrot learned a word
our flight leaves early
mind the wet paint
the heating works now
you left the window open
""")

FORECAST = lines("""
What is the weather in {0}?
Will it rain in {0}?
How warm is it in {0}?
Weather for {0}, please
Tell me the forecast for {0}
Do I need a coat in {0}?
Is it sunny in {0} today?
I am going to {0}, what is the weather like?
Check the weather in {0}
How cold does it get in {0}?
""")
DIAL = lines("""
Call {0}
Please call {0}
Can you ring {0}?
Give {0} a call
I want to talk to {0}
Phone {0} for me
Get {0} on the phone
Could you dial {0}, please?
I need to speak with {0}
""")
PLAY = lines("""
Play {0}
I want to hear {0}
Put on {0}
Can you play {0}?
Play the song {0}
Let's listen to {0}
Please put {0} on
Could you play {0} for me?
I feel like hearing {0}
""")
BUY = lines("""
Add {0} to the shopping list
We need {0}
Put {0} on my list
Please buy {0}
We have run out of {0}
Can you order {0}?
Don't forget to get {0}
I would like to buy {0}
Get me {0} from the shop
""")
REMIND = lines("""
Remind me to {0}
Please remind me to {0}
Remember that I have to {0}
Can you remind me to {0}?
Set a reminder to {0}
I must {0}, don't let me forget
Don't let me forget to {0}
""")
MESSAGE = lines("""
Tell {0} that {1}
Send a message to {0} saying {1}
Text {0} that {1}
Let {0} know that {1}
Write to {0}: {1}
Can you tell {0} that {1}?
Message {0} and say {1}
""")
CLOCK = lines("""
What time is it?
Tell me the time
Do you know what time it is?
What's the time, please?
Could you tell me the time?
How late is it?
Time please
What does the clock say?
Can you check the clock?
I need to know the time
Is it late already?
What time do we have?
Give me the current time
Please tell me what time it is
What is the hour?
Have you got the time?
Show me the time
Is it noon yet?
What time is it right now?
Say what time it is
""")
JOKE = lines("""
Tell me a joke
Make me laugh
Say something funny
Do you know a joke?
I need a good laugh
Another joke, please
Cheer me up
Tell us something funny
Can you tell a joke?
I want to hear a joke
Got any jokes?
Please make me laugh
Give me your best joke
Be funny for a moment
Say a joke
Entertain me with a joke
I could use a joke
Amuse me
One more joke
Do you have a funny story?
""")

SKILLS = {
    "forecast": ('forecast(city="[city]") says what the weather will be in a place.', FORECAST, (("city", CITIES),)),
    "dial": ('dial(person="[person]") rings somebody up.', DIAL, (("person", PEOPLE),)),
    "play": ('play(title="[title]") plays a song.', PLAY, (("title", TITLES),)),
    "buy": ('buy(item="[item]") puts something on the shopping list.', BUY, (("item", ITEMS),)),
    "remind": ('remind(task="[task]") reminds of a chore.', REMIND, (("task", TASKS),)),
    "message": (
        'message(to="[to]", text="[text]") sends somebody a few words.',
        MESSAGE,
        (("to", RECIPIENTS), ("text", TEXTS)),
    ),
    "clock": ("clock() says what time it is.", CLOCK, ()),
    "joke": ("joke() tells a joke.", JOKE, ()),
}


def main() -> None:
    rng = random.Random(5)
    for name, (prompt, phrasings, slots) in SKILLS.items():
        pairs = examples(rng, name, phrasings, slots)
        shown = [f"### User: {user}\n### Assistant: {call}\n" for user, call in pairs]
        text = "\n".join(
            ["#### Prompt:", prompt, "", "#### Prompt Examples:", "", *shown[:2], "#### Examples:", "", *shown[2:]]
        )
        (Path(__file__).parent / f"{name}_examples.txt").write_text(text)
        print(f"{name}: {len(pairs)} examples")


def examples(
    rng: random.Random, name: str, phrasings: list[str], slots: tuple[tuple[str, list[str]], ...]
) -> list[tuple[str, str]]:
    """Each value once, in a phrasing of its turn."""
    if not slots:
        return [(phrasing, f"{name}()") for phrasing in phrasings]
    columns = [rng.sample(values, len(values)) for _, values in slots]
    pairs = []
    for number, row in enumerate(zip(*columns, strict=True)):
        user = phrasings[number % len(phrasings)].format(*row)
        arguments = ", ".join(f'{key}="{value}"' for (key, _), value in zip(slots, row, strict=True))
        pairs.append((user if user[0] == row[0][0] else user[0].upper() + user[1:], f"{name}({arguments})"))
    return pairs


if __name__ == "__main__":
    main()
