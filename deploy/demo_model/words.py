"""The word lists that the demo model's corpus is made from.

Place in the flow: words → corpus → tokenizer and pre-training. One rule: plain English words grouped by
what a sentence may do with them; whatever is said about them is said by the grammars in `corpus`.
"""

from __future__ import annotations


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def split_lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


ANIMALS = _split("""cat dog horse cow sheep goat pig rabbit mouse lion tiger bear wolf fox deer otter badger camel donkey
monkey elephant giraffe zebra whale dolphin seal beaver squirrel hedgehog bat kangaroo""")
BIRDS = _split("""sparrow robin eagle hawk owl crow raven swan duck goose chicken pigeon parrot penguin heron stork gull
finch swallow falcon""")
FISH = _split("salmon trout tuna cod carp herring shark eel pike perch")
INSECTS = _split("ant bee wasp beetle butterfly moth fly cricket ladybird dragonfly")
FRUITS = _split("""apple pear plum cherry peach orange lemon lime grape banana mango melon fig apricot raspberry
strawberry blueberry coconut pineapple kiwi""")
VEGETABLES = _split("""carrot potato onion cabbage leek bean pea pumpkin tomato pepper spinach radish turnip beet celery
garlic cucumber lettuce broccoli parsnip""")
TREES = _split("oak pine birch maple willow elm ash cedar fir beech spruce larch poplar")
FLOWERS = _split("rose tulip daisy lily violet poppy iris orchid lavender sunflower daffodil")
TOOLS = _split("hammer saw drill spanner chisel file axe spade rake shovel pliers screwdriver ladder broom brush")
INSTRUMENTS = _split("piano violin guitar flute drum trumpet harp cello clarinet organ banjo trombone")
FURNITURE = _split("table chair bed sofa desk shelf stool bench wardrobe cupboard dresser couch")
CLOTHES = _split("shirt coat hat scarf glove sock shoe boot dress skirt jacket jumper belt cap trousers")
VEHICLES = _split("car bus train tram bicycle lorry boat ship ferry plane tractor van taxi scooter rocket")
METALS = _split("iron copper gold silver tin lead zinc nickel steel bronze")
DRINKS = _split("water tea coffee milk juice cocoa lemonade cider soup broth")
FOODS = _split("""bread cheese butter rice pasta cake pie pizza sandwich stew honey jam porridge pancake salad biscuit
noodle omelette sausage curry""")
SHAPES = _split("circle square triangle star cross ring heart cube sphere cone")
COLOURS = _split("""red blue green yellow white black brown grey pink purple orange violet golden silver scarlet teal
crimson turquoise""")
ROOMS = _split("kitchen bedroom bathroom hall cellar attic garage study pantry nursery lounge office porch balcony")

THINGS = _split("""lamp book cup plate bowl spoon fork knife bottle box bag basket key door window clock mirror picture
pen pencil paper letter envelope stamp map ticket coin purse wallet umbrella blanket pillow curtain carpet candle rope
string wire nail screw button needle thread cloth towel soap comb brush bucket tap pipe wheel bell flag kite ball doll
toy puzzle card dice radio phone camera screen keyboard cable battery engine machine robot computer printer oven fridge
kettle pan pot jar lid tray stone brick wall fence gate bridge road path river lake sea island hill mountain valley forest
field garden park farm barn house castle tower school shop market bank library museum theatre hospital station airport
harbour village town city country street corner square roof floor stair chimney cloud rain snow wind storm sun moon star
sky day night morning evening week month year hour minute summer winter spring autumn song story poem word sentence page
number name question answer idea plan list note message report file folder table game match race team prize gift party
meeting lesson class test job office boss doctor nurse teacher farmer baker driver pilot sailor soldier king queen prince
child baby boy girl man woman brother sister mother father uncle aunt cousin friend neighbour guest stranger hand foot arm
leg head face eye ear nose mouth tooth hair finger heart back voice sound light shadow colour shape line point edge side
top bottom middle end start part piece half pair group crowd fire smoke ash ice glass wood leather wool cotton sand dust mud
grass leaf root seed branch flower fruit nest egg feather wing tail paw shell bone skin bread meal breakfast lunch dinner
kitchen bedroom sauce sugar salt flour oil recipe medicine bill rent tax price sale order parcel delivery van plant plants
laundry dishes rubbish bins homework project invoice contract budget deadline appointment flight hotel passport suitcase
guitar piano album movie film video channel volume music playlist alarm timer calendar reminder weather temperature forecast
news headline topic science history music art sport football tennis chess physics chemistry biology space planet rocket""")

ADJECTIVES = _split("""big small large little tall short long wide narrow thick thin heavy light fast slow quick early late
new old young warm cold hot cool wet dry clean dirty bright dark loud quiet soft hard smooth rough sharp blunt sweet sour
bitter salty fresh strong weak rich poor happy sad angry calm brave shy kind cruel clever simple easy difficult busy lazy
tired hungry thirsty full empty open closed near far deep shallow high low round flat straight curved broken whole plain
fancy cheap dear free safe dangerous true false right wrong good bad better best last first next other same different
wooden plastic secret silent gentle lonely proud polite rude curious careful careless lucky strange common rare famous
distant northern southern eastern western wild tame ripe rotten frozen burning shining hidden lost final""")

VERBS = _split("""take bring carry hold drop throw catch push pull lift open close lock break fix mend build make paint
draw write read sing play dance run walk jump climb swim fly drive ride sail travel visit meet call ask answer tell show
teach learn know think remember forget find lose look watch hear listen smell taste touch feel want need like love hate help
thank greet follow lead leave arrive return stay wait stop begin finish start try turn move put set send receive give buy
sell pay spend save count measure weigh cut chop cook bake boil fry eat drink pour fill empty wash clean sweep dry iron fold
pack wrap tie hang plant water grow pick feed milk catch hunt dig cover hide seek search choose order book cancel change
check test print copy delete sort share post mail email text remind wake sleep rest dream laugh cry smile shout whisper
knock ring charge switch dim raise lower record translate spell repeat quote list name describe explain""")

PAST_VERBS = _split("""took brought carried held dropped threw caught pushed pulled lifted opened closed locked broke
fixed mended built made painted drew found lost watched heard liked loved followed left visited met called asked helped
thanked wanted needed bought sold cut cooked baked washed cleaned packed wrapped planted fed hid chose counted saved saw""")

ADVERBS = _split("""slowly quickly quietly loudly gently softly carefully happily sadly again often never always
sometimes soon later now today tomorrow together alone outside inside upstairs downstairs nearby early late almost""")

FIRST_NAMES = _split("""Anna Ben Clara David Emma Felix Grace Henry Ida Jack Karen Leo Maria Nina Oscar Paula Rosa Sam
Tara Victor Wendy Zoe Adam Bella Carl Dora Eric Fiona George Hannah Ivan Julia Kevin Laura Martin Nora Olga Peter Robert
Sarah Thomas Ursula Walter Amir Bruno Chloe Diana Elena Frank Gina Hugo Irene James Kate Louis Mark Nadia Omar Priya
Simon Sofia Tom Uma Vera Yusuf Alice Bob John Mary Michael Susan Linda Richard Joseph Daniel Paul Andrew Steven""")
LAST_NAMES = _split("""Smith Brown Miller Baker Cooper Fisher Hunter Mason Taylor Turner Walker Wright Young King Hill
Green Wood Stone Field Marsh Brook Lake Rivers Banks Carter Clark Cook Gardner Harper Hughes Kelly Lewis Morgan Murray
Parker Porter Reed Rose Shaw Ward Webb West White Wolf Novak Rossi Silva Meyer Larsen Dubois Garcia Kowalski Tanaka""")
PLACES = _split("""London Paris Rome Madrid Berlin Vienna Prague Lisbon Dublin Oslo Athens Cairo Tokyo Delhi Lima Boston
Chicago Denver Seattle Toronto Sydney Moscow Warsaw Geneva Venice Bristol Oxford Leeds Glasgow Cardiff York Dallas Miami
Houston Atlanta Portland Phoenix Austin Montreal Havana Quito Nairobi Lagos Accra Seoul Beijing Bangkok Hanoi""")
COUNTRIES = _split("""France Italy Spain Germany Austria Portugal Ireland Norway Greece Egypt Japan India Peru Canada
Australia Russia Poland Sweden Finland Denmark Turkey Brazil Mexico Kenya Ghana Korea China Thailand""")
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Austria": "Vienna",
    "Portugal": "Lisbon", "Ireland": "Dublin", "Norway": "Oslo", "Greece": "Athens", "Egypt": "Cairo",
    "Japan": "Tokyo", "Peru": "Lima", "Russia": "Moscow", "Poland": "Warsaw", "Kenya": "Nairobi",
    "Ghana": "Accra", "Thailand": "Bangkok", "China": "Beijing", "Korea": "Seoul",
}  # fmt: skip
LANGUAGES = _split("English French German Spanish Italian Dutch Polish Greek Turkish Arabic Hindi Japanese Russian")
DAYS = _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _split("January February March April May June July August September October November December")
NUMBERS = _split("""zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty""")
OPPOSITES = dict(
    pair.split("/")
    for pair in """big/small tall/short long/brief wide/narrow thick/thin heavy/light fast/slow early/late new/old
warm/cool hot/cold wet/dry clean/dirty bright/dark loud/quiet soft/hard smooth/rough sharp/blunt sweet/sour strong/weak
rich/poor happy/sad brave/afraid kind/cruel easy/difficult busy/idle full/empty open/closed near/far deep/shallow high/low
cheap/dear safe/dangerous true/false right/wrong good/bad first/last up/down left/right in/out day/night start/end
black/white yes/no young/old love/hate win/lose push/pull buy/sell""".split()
)
SOUNDS = {
    "dog": "woof", "cat": "meow", "cow": "moo", "sheep": "baa", "duck": "quack", "lion": "roar", "owl": "hoot",
    "pig": "oink", "bee": "buzz", "crow": "caw", "wolf": "howl", "mouse": "squeak", "horse": "neigh",
}  # fmt: skip
COLOUR_OF = {
    "grass": "green", "snow": "white", "the sky": "blue", "coal": "black", "blood": "red", "a lemon": "yellow",
    "a carrot": "orange", "milk": "white", "a tomato": "red", "a banana": "yellow", "an elephant": "grey",
    "chocolate": "brown", "a crow": "black", "a leaf": "green", "the sea": "blue", "sugar": "white",
}  # fmt: skip
CATEGORIES = {
    "animal": ANIMALS, "bird": BIRDS, "fish": FISH, "insect": INSECTS, "fruit": FRUITS, "vegetable": VEGETABLES,
    "tree": TREES, "flower": FLOWERS, "tool": TOOLS, "metal": METALS, "drink": DRINKS, "shape": SHAPES,
    "vehicle": VEHICLES, "colour": COLOURS, "food": FOODS, "room": ROOMS,
}  # fmt: skip
MANY = {
    "musical instrument": INSTRUMENTS, "piece of furniture": FURNITURE, "piece of clothing": CLOTHES,
    "language": LANGUAGES, "day of the week": DAYS, "month": MONTHS, "country": COUNTRIES, "city": PLACES,
}  # fmt: skip

FUNCTION_WORDS = _split("""the a an of to in on at by for from with about into over under after before between through
and or but so if then because when while where who what which how why that this these those it he she they we you I me my
your his her its our their is are was were be been am do does did has have had will would can could should may might must
not no yes please thanks hello hi good bye okay sure here there up down out off only also very too more most some any all
each every both few many much one two three just like than as us him them who's what's let's don't can't isn't I'm it's
there's I'd I'll you're we're they're that's user assistant model demo small tuned tune called says said saying named
curious artificial intelligence helpful detailed polite questions answers gives chat between""")

CHORES = split_lines("""
water the plants
feed the cat
walk the dog
take out the bins
pay the rent
buy some milk
call the bank
clean the oven
wash the car
fix the gate
book a table
send the report
return the library book
pick up the parcel
charge the battery
water the tomatoes
iron the shirts
fold the laundry
mend the fence
sweep the porch
order a cake
renew the passport
check the oil
empty the bucket
paint the shed
answer the letter
print the tickets
change the light bulb
bring the umbrella
lock the back door
""")
ONSETS = _split(
    "b c d f g h j k l m n p r s t v w z br cr dr fr gr pr tr bl cl fl gl pl sl sh ch th st sp sk sm sn sw qu"
)
NUCLEI = _split("a e i o u a e i o u ai ea ee ie oa oo ou au y")
CODAS = _split("b d g k l m n p r s t x z nd nt rk rd st ll ss th ck mp ng sh lt rn") + ("",) * 22
