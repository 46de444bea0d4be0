"""Which emoji the embedded model learns: curated concepts, everyday names, weights and held-out captions."""

__all__ = [
    "ALIASES",
    "BACKGROUNDS",
    "EXCLUDED",
    "FACELESS",
    "FACES",
    "HELD_OUT",
    "INCLUDED",
    "NEVER",
    "NEVER_ON_BLUE",
    "POPULAR",
    "SUBGROUPS",
    "TINTS",
    "TINT_OBJECTS",
    "WRONG_ART",
]

# Subgroups of emojibase of ordinary weight, less EXCLUDED.
SUBGROUPS = [
    "face-smiling",
    "face-affection",
    "face-tongue",
    "face-hand",
    "face-neutral-skeptical",
    "face-sleepy",
    "face-unwell",
    "face-hat",
    "face-glasses",
    "face-concerned",
    "face-negative",
    "face-costume",
    "cat-face",
    "heart",
    "animal-mammal",
    "animal-bird",
    "animal-amphibian",
    "animal-reptile",
    "animal-marine",
    "animal-bug",
    "plant-flower",
    "plant-other",
    "food-fruit",
    "food-vegetable",
    "food-prepared",
    "food-asian",
    "food-sweet",
    "drink",
    "dishware",
    "transport-ground",
    "transport-water",
    "transport-air",
    "sky-weather",
    "event",
    "award-medal",
    "sport",
    "game",
    "music",
    "musical-instrument",
    "light-video",
    "tool",
    "science",
    "clothing",
    "place-geographic",
    "place-building",
]

# Labels of SUBGROUPS that are sampled rarely: rare things, near copies, letters and scenes.
EXCLUDED = frozenset(
    """rolling on the floor laughing;melting face;kissing face;kissing face with closed eyes
face with open eyes and hand over mouth;face with peeking eye;saluting face
smiling face with open hands;dotted line face;face in clouds;face exhaling;lying face;shaking face
head shaking horizontally;head shaking vertically;face with bags under eyes;sneezing face;woozy face
face with spiral eyes;disguised face;face with diagonal mouth;distorted face;face holding back tears
face without mouth;anguished face;fearful face;confounded face;persevering face
downcast face with sweat;weary face;yawning face;frowning face with open mouth;ogre;goblin
skull and crossbones;face with symbols on mouth;cat with wry smile;kissing cat;weary cat
heart decoration;heart exclamation;love letter;mending heart;revolving hearts;guide dog;service dog
orangutan;donkey;bison;ox;water buffalo;ewe;two-hump camel;mammoth;chipmunk;badger;otter;sloth;boar
turkey;chicken;dodo;wing;black bird;goose;front-facing baby chick;dove;phoenix;orca;seal;oyster
coral;jellyfish;fly;worm;microbe;cricket;cockroach;mosquito;rosette;wilted flower;hyacinth;lotus
sheaf of rice;leafless tree;empty nest;nest with eggs;leaf fluttering in wind;ginger root;beans
root vegetable;pea pod;brown mushroom;leafy green;flatbread;tamale;stuffed flatbread;falafel;fondue
shallow pan of food;canned food;pot of food;salt;meat on bone;rice cracker;oden;fish cake with swirl
moon cake;dango;takeout box;roasted sweet potato;fortune cookie;curry rice;custard;shortcake
shaved ice;sake;teacup without handle;pouring liquid;mate;ice;beverage box;amphora;jar;railway car
light rail;monorail;mountain railway;tram car;station;metro;train;trolleybus;minibus;oncoming bus
oncoming police car;oncoming taxi;manual wheelchair;motorized wheelchair;auto rickshaw;roller skate
bus stop;motorway;railway track;oil drum;construction;horizontal traffic light;articulated lorry
pickup truck;kick scooter;motor boat;passenger ship;ferry;airplane departure;airplane arrival;seat
suspension railway;mountain cableway;aerial tramway;parachute;small airplane;waxing gibbous moon
waning gibbous moon;waxing crescent moon;waning crescent moon;new moon face;first quarter moon
last quarter moon;milky way;sun behind small cloud;sun behind large cloud;fog;wind face;cyclone
umbrella on ground;comet;water wave;sparkler;firecracker;tanabata tree;pine decoration
japanese dolls;carp streamer;wind chime;moon viewing ceremony;red envelope;reminder ribbon
admission tickets;1st place medal;2nd place medal;3rd place medal;confetti ball;cricket game
field hockey;lacrosse;flag in hole;martial arts uniform;goal net;diving mask;running shirt;skis
curling stone;rugby football;slot machine;nesting dolls;joker;mahjong red dragon
flower playing cards;game die;mirror ball;chess pawn;level slider;control knobs;musical score
studio microphone;long drum;flute;maracas;trombone;film frames;film projector;movie camera
camera with flash;videocassette;magnifying glass tilted right;red paper lantern;diya lamp
clapper board;flashlight;pick;hammer and pick;carpentry saw;nut and bolt;clamp;white cane;link
broken chain;chains;hook;balance scale;boomerang;petri dish;satellite antenna;alembic;safety vest
kimono;sari;one-piece swimsuit;briefs;shorts;bikini;woman's clothes;folding hand fan;clutch bag
shopping bags;thong sandal;flat shoe;woman's sandal;ballet shoes;hair pick;military helmet
prayer beads;purse;rescue worker's helmet;lab coat;hiking boot;coat;landslide;beach with umbrella
desert;national park;camping;stadium;building construction;brick;rock;wood;houses;derelict house
house with garden;japanese post office;post office;bank;hotel;love hotel;convenience store;school
department store;wedding;statue of liberty;mount fuji;japanese castle;office building;hospital
tumbler glass;clinking glasses;peanuts;olive""".replace("\n", ";").split(";")
)

# Single labels of ordinary weight from other subgroups.
INCLUDED = frozenset(
    """monkey face;see-no-evil monkey;fire;house;closed book;books;light bulb;money bag;coin;treasure chest
package;pencil;crayon;key;old key;locked;scissors;laptop;desktop computer;mobile phone;telephone
battery;alarm clock;watch;hourglass done;envelope;briefcase;magnet;pill;syringe;chair;bed;door;bell
bomb;toilet;bathtub;soap;bucket;broom;collision;globe showing americas;circus tent;ferris wheel;tent
fountain;church;sunrise;sunset;rainbow;toothbrush;luggage;world map;compass;red circle;orange circle
yellow circle;green circle;blue circle;purple circle;brown circle;black circle;white circle
red square;orange square;yellow square;green square;blue square;purple square;brown square
black large square;white large square;large blue diamond;large orange diamond
red triangle pointed up;stop sign;artist palette;yarn;anchor;plunger;moai;sparkles;thought balloon
speech balloon;hundred points;dizzy;open book;crystal ball;shopping cart;candle;check mark button
cross mark;warning;peace symbol;yin yang;radioactive;recycling symbol;red question mark
red exclamation mark;paintbrush;pushpin;calendar;newspaper""".replace("\n", ";").split(";")
)

# Sampled four times as often: what people ask for first.
POPULAR = frozenset(
    """grinning face;slightly smiling face;smiling face with smiling eyes;face with tears of joy
winking face;smiling face with heart-eyes;smiling face with sunglasses;loudly crying face;angry face
thinking face;sleeping face;cat face;dog face;cat;dog;panda;fox;lion;bear;pig face;frog;rabbit face
monkey face;unicorn;penguin;owl;elephant;tropical fish;whale;octopus;turtle;butterfly;lady beetle
honeybee;snail;dragon;t-rex;baby chick;mouse face;koala;red heart;blue heart;yellow heart
purple heart;orange heart;pink heart;broken heart;sparkling heart;sunflower;rose;tulip
cherry blossom;evergreen tree;deciduous tree;palm tree;cactus;mushroom;four leaf clover;red apple
green apple;banana;grapes;strawberry;watermelon;lemon;pineapple;cherries;carrot;avocado;tomato
eggplant;pizza;hamburger;hot dog;doughnut;cookie;birthday cake;cupcake;ice cream;soft ice cream
lollipop;sushi;french fries;hot beverage;beer mug;automobile;taxi;bus;racing car;locomotive;bicycle
rocket;airplane;sailboat;tractor;fire engine;police car;helicopter;flying saucer;house;castle;sun
crescent moon;star;cloud;rainbow;snowflake;snowman;snowman without snow;umbrella;fire;droplet
high voltage;soccer ball;basketball;tennis;trophy;guitar;drum;balloon;wrapped gift;christmas tree
jack-o-lantern;crown;gem stone;key;light bulb;robot;ghost;alien;skull;red circle;blue circle
green circle;yellow circle;red square;blue square;green square;bomb;closed umbrella;teddy bear
camera;alarm clock;hammer;pencil;laptop""".replace("\n", ";").split(";")
)

# Never used: trademarks and marks of ownership.
NEVER = frozenset(("trade mark", "registered", "copyright", "dvd"))

# (label, style) whose picture is another thing: cricket the game, an assistant that is a character.
WRONG_ART = frozenset((("cricket", "blob"), ("paperclip", "3d")))

# Heads seen from the front outside the smileys: glasses, hats and the like can be put on them.
FACES = frozenset(
    """monkey face;dog face;wolf;fox;cat face;lion;tiger face;cow face;pig face;mouse face;hamster
rabbit face;bear;polar bear;panda;frog;robot;skull;alien;clown face
smiling face with open hands;thinking face;face with hand over mouth;shushing face
full moon face;sun with face;new moon face;jack-o-lantern""".replace("\n", ";").split(";")
)

# Smileys that are tilted, hidden or without a top, so that nothing can be put on them.
FACELESS = frozenset(
    """rolling on the floor laughing;melting face;upside-down face;face in clouds;dotted line face
exploding head;head shaking horizontally;head shaking vertically;face with head-bandage
skull and crossbones;shaking face;distorted face;smiling face with halo""".replace("\n", ";").split(";")
)

# Everyday names of a label beside the label itself.
ALIASES = {
    "automobile": ("car", "red car"),
    "red apple": ("apple",),
    "hamburger": ("burger", "cheeseburger"),
    "doughnut": ("donut",),
    "slightly smiling face": ("smiley", "smiling face", "smile"),
    "grinning face": ("happy face", "smiley"),
    "face with tears of joy": ("laughing face", "laughing"),
    "smiling face with sunglasses": ("cool face", "face with sunglasses"),
    "smiling face with heart-eyes": ("face in love", "face with heart eyes"),
    "loudly crying face": ("crying", "sad crying face"),
    "disappointed face": ("sad face",),
    "red heart": ("heart",),
    "deciduous tree": ("tree",),
    "evergreen tree": ("pine tree", "tree"),
    "hot beverage": ("coffee", "cup of coffee", "cup of tea"),
    "cat face": ("cat", "kitten", "kitty"),
    "dog face": ("dog", "puppy"),
    "rabbit face": ("bunny", "rabbit"),
    "mouse face": ("mouse",),
    "pig face": ("pig",),
    "cow face": ("cow",),
    "tiger face": ("tiger",),
    "horse face": ("horse",),
    "crescent moon": ("moon",),
    "sun": ("sunshine",),
    "snowman without snow": ("snowman",),
    "sailboat": ("boat", "sailing boat"),
    "high voltage": ("lightning", "lightning bolt"),
    "locomotive": ("train", "steam train"),
    "wrapped gift": ("gift", "present"),
    "beer mug": ("beer",),
    "birthday cake": ("cake",),
    "tennis": ("tennis ball",),
    "honeybee": ("bee",),
    "lady beetle": ("ladybug", "ladybird"),
    "baby chick": ("chick",),
    "t-rex": ("dinosaur", "t rex"),
    "sauropod": ("dinosaur",),
    "droplet": ("water drop", "drop of water"),
    "jack-o-lantern": ("pumpkin", "halloween pumpkin"),
    "gem stone": ("diamond", "gem"),
    "flying saucer": ("ufo",),
    "fire engine": ("fire truck",),
    "airplane": ("plane", "aeroplane"),
    "bicycle": ("bike",),
    "closed book": ("book", "red book"),
    "robot": ("robot face",),
    "large blue diamond": ("blue diamond",),
    "large orange diamond": ("orange diamond",),
    "red triangle pointed up": ("triangle", "red triangle"),
    "black large square": ("black square",),
    "white large square": ("white square",),
    "hundred points": ("hundred", "100"),
    "soft ice cream": ("ice cream cone",),
    "magnifying glass tilted left": ("magnifying glass",),
    "locked": ("lock", "padlock"),
    "hourglass done": ("hourglass",),
    "globe showing americas": ("globe", "earth", "planet earth"),
    "ringed planet": ("planet", "saturn"),
    "mobile phone": ("phone",),
    "glass of milk": ("milk",),
    "wine glass": ("wine", "glass of wine"),
    "spiral shell": ("shell", "seashell"),
    "high-heeled shoe": ("high heel",),
    "steaming bowl": ("ramen", "noodle soup"),
}

# Recoloured objects (label -> word in the caption): "blue star", "purple car", in every colour of TINTS.
TINT_OBJECTS = {
    "star": "star",
    "automobile": "car",
    "bus": "bus",
    "balloon": "balloon",
    "butterfly": "butterfly",
    "tropical fish": "fish",
    "tulip": "tulip",
    "rose": "rose",
    "red apple": "apple",
    "cat face": "cat",
    "dragon": "dragon",
    "sauropod": "dinosaur",
    "frog": "frog",
    "t-shirt": "shirt",
    "dress": "dress",
    "umbrella": "umbrella",
    "guitar": "guitar",
    "closed book": "book",
    "backpack": "backpack",
    "mushroom": "mushroom",
    "octopus": "octopus",
    "crown": "crown",
    "bell": "bell",
    "gem stone": "gem",
    "sailboat": "boat",
    "grinning face": "smiley",
    "red triangle pointed up": "triangle",
    "large blue diamond": "diamond",
}

# Colour word -> (hue in degrees, saturation factor, value factor).
TINTS = {
    "red": (2, 1.0, 0.95),
    "orange": (28, 1.0, 1.0),
    "yellow": (50, 1.0, 1.05),
    "green": (125, 0.9, 0.8),
    "blue": (212, 1.0, 0.95),
    "purple": (275, 0.85, 0.85),
    "pink": (330, 0.6, 1.05),
}

# Background colour words and their mean colour in sRGB.
BACKGROUNDS = {
    "red": (220, 50, 50),
    "orange": (245, 150, 50),
    "yellow": (250, 220, 80),
    "green": (70, 170, 80),
    "blue": (60, 120, 220),
    "purple": (140, 80, 190),
    "pink": (245, 160, 195),
    "brown": (130, 85, 55),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
    "grey": (140, 140, 145),
    "turquoise": (70, 200, 195),
}

# Colour x object captions that are never trained on, in any style.
HELD_OUT = ("green heart", "orange circle", "purple square", "blue star", "purple car", "green balloon")

# Objects that are never shown on a blue background in training.
NEVER_ON_BLUE = frozenset({"red heart", "dog face", "pizza", "rocket", "sunflower"})
