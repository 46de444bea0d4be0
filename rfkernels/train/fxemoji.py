"""Icons of fxemoji by the emoji's label, where the icon's name is none of the emoji's names.

An empty name: the icon called like the emoji shows something else, so fxemoji has none.
"""

__all__ = ["FX_ICONS"]

_PAIRS = """\
grinning face=grin;beaming face with smiling eyes=grineyes;grinning face with big eyes=grinwide
grinning face with smiling eyes=grinwideeyes;grinning squinting face=grinsquint
grinning face with sweat=grinsweat;face with tears of joy=grintears;slightly smiling face=smallsmile
smiling face with smiling eyes=smileeyes;smiling face=whitesmilingface;winking face=winking
face savoring food=smiletongue;face with tongue=tongueout;winking face with tongue=tongueoutwink
squinting face with tongue=tongueoutwink2;kissing face=kiss;face blowing a kiss=kissing
kissing face with closed eyes=kissclosedeyes;kissing face with smiling eyes=kisseyes
slightly frowning face=smallfrown;frowning face with open mouth=frownmouth;anguished face=anguish
sad but relieved face=dissapointedrelief;loudly crying face=loudlycrying;persevering face=perservere
face screaming in fear=screamfear;smiling face with horns=devilhorns;pile of poo=poo
goblin=japaneseangrymask;skull and crossbones=blackskullcrossbones;smiling face with sunglasses=sunglasses
sunglasses=darksunglasses;see-no-evil monkey=monkeysee;hear-no-evil monkey=monkeyhear
speak-no-evil monkey=monkeyspeak;heart with arrow=heartarrow;heart with ribbon=heartribbon
beating heart=beating-heart;two hearts=2hearts;yellow heart=heartyellow;green heart=heartgreen
blue heart=heartblue;purple heart=heartpurple;heart suit=blackheartsuit;spade suit=blackspadesuit
club suit=blackclubsuit;diamond suit=blackdiamondsuit;sweat droplets=sweatsplash;speech balloon=speechbubble
thought balloon=thoughtbaloon;raised hand=hand;hand with fingers splayed=raisedhandsfingerssplayed
vulcan salute=raisedhandpartfingers;ok hand=aok;waving hand=waving;backhand index pointing left=left
backhand index pointing right=right;backhand index pointing up=up;backhand index pointing down=down
index pointing up=index;oncoming fist=fistedhand;raising hands=high5;open hands=hands
writing hand=leftwritinghand;flexed biceps=flexbicep;person: blond hair=blonde;old woman=gma;old man=gpa
person frowning=frown;person pouting=pout;enraged face=pouting;person gesturing no=nogesture
person gesturing ok=okgesture;person tipping hand=waitress;person raising hand=handup;person bowing=bowing
detective=sleuthspy;construction worker=construct;person wearing turban=turban;person with veil=bride
person with skullcap=guapimao;person getting massage=headmassage;women holding hands=girlgirl
men holding hands=guyguy;woman and man holding hands=girlguy;couple with heart=couple;kiss=couplekiss
bust in silhouette=contact;busts in silhouette=contact2;people with bunny ears=bunny-ears;dog=dogside
cat=catside;tiger=tigerside;leopard=leopardside;pig=pigside;pig nose=pigsnout;mouse=mouseside
rabbit=bunnyside;hamster=hampster;fox=foxsmiling;front-facing baby chick=frontfacingchick
dragon face=dragonhead;dragon=dragonside;spouting whale=spurtingwhale;bouquet=bouquetofflowers
evergreen tree=evergreen;fallen leaf=fallingleaf;leaf fluttering in wind=leaffluttering
hot pepper=chilipepper;fish cake with swirl=fishcakeswirl;fork and knife with plate=forkknife
globe showing europe-africa=europeafricaglobe;globe showing americas=americasglobe
globe showing asia-australia=asiaaustraliaglobe;globe with meridians=meridianglobe
map of japan=silhouetteohjapan;building construction=construction;construction=constructionsign
tokyo tower=toykotower;snow-capped mountain=snowmountains;bullet train=highspeedtrainbulletnose
racing car=racecar;locomotive=steamlocomotive;train=train;mantelpiece clock=manltepiececlock
twelve o'clock=clock12oclock;one o'clock=clock1oclock;two o'clock=clock2oclock;three o'clock=clock3oclock
four o'clock=clock4oclock;six o'clock=clock6oclock;seven o'clock=clock7oclock;twelve-thirty=clock12thirty
one-thirty=clock1thirty;two-thirty=clock2thirty;three-thirty=clock3thirty;four-thirty=clock4thirty
five-thirty=clock5thirty;waning gibbous moon=waningbibbousmoon;sun=sunrays;star=whitemediumstar
glowing star=star;sun behind small cloud=whitesunsmallcloud;sun behind large cloud=whitesunbehindcloud
sun behind rain cloud=sunraincloud;cloud with rain=raincloud;cloud with snow=snowcloud
cloud with lightning=stormcloud;high voltage=bolt;closed umbrella=umbrella;umbrella=;fog=;water pistol=
boar=;growing heart=;sparkling heart=;tram car=;upwards button=;downwards button=;game die=
confetti ball=confetti;ribbon=bow;reminder ribbon=reminder;rosette=rosette;joker=playingcardblackjoker
necktie=tie;t-shirt=mansshirt;woman's clothes=womansshirt;purse=pinkwallet;clutch bag=makeupbag
man's shoe=mensshoe;running shoe=mensrunner;high-heeled shoe=heels;woman's sandal=sandals
muted speaker=speakercancellation;speaker low volume=speaker;speaker medium volume=speakeronesoundwave
speaker high volume=speaker3soundwaves;bell with slash=bellcancellation;studio microphone=studiomic
control knobs=controlknob;mobile phone=cellphone;mobile phone with arrow=phonerightarrowleft
telephone=blacktelephone;telephone receiver=telephonereceiver2;floppy disk=floppydisk2
video camera=handheldvideocamera;videocassette=videocasette;magnifying glass tilted left=leftmagnifyingglass
magnifying glass tilted right=rightmagnifyingglass;laptop=oldpersonalcomputer
desktop computer=personalcomputer;keyboard=wiredkeyboard
notebook with decorative cover=notebookdecorativecover;bookmark tabs=bookmarktab;yen banknote=banknoteyen
dollar banknote=banknotedollar;euro banknote=banknoteeuro;pound banknote=banknotepound
chart increasing with yen=chartupwardstrendyen;chart increasing=chartupwardstrend
chart decreasing=chartdownwardstrend;envelope with arrow=envelopedownarrowabove;outbox tray=outbox
closed mailbox with raised flag=closedmailboxraised;closed mailbox with lowered flag=closedmailboxlowered
open mailbox with raised flag=openmailboxraised;open mailbox with lowered flag=openmailboxlowered
ballot box with ballot=ballottboxwithballott;pen=lowerleftpen;pencil=lowerleftpencil;scissors=blackscissors
locked with key=lockandkey;litter in bin sign=putlitterinitsplacesymbol;potable water=potablewatersystem
no one under eighteen=nooneunder18symbol;right arrow=blackrightwardsarrow;left arrow=leftwardsblackarrow
right arrow curving up=arrowrightwardsupwards;right arrow curving down=arrowrightwardsdownwards
clockwise vertical arrows=clockwisedownupcircledarrows
counterclockwise arrows button=anticlockwiseupwardsanddownwardsarrows;back arrow=backwithleftwardsarrow
end arrow=endwithleftwardsarrow;on! arrow=onarrowleftright;soon arrow=soonwithrightarrow
top arrow=topwithupwardsarrow;latin cross=heavylatincross;dotted six-pointed star=sixpointedstarwithdot
sagittarius=saggitarius;repeat button=clockwiserightwardsleftwardscirclearrows
repeat single button=clockwiserightwardsleftwardscirclearrowsone;play button=blackrightpointingarrow
reverse button=blackleftpointingarrow;fast-forward button=blackrightpointingdoublearrow
fast reverse button=blackleftpointingdoublearrow;fast up button=blackuppointingdoublearrow
fast down button=blackdownpointingdoublearrow;multiply=heavymultiplicationsymbol
double exclamation mark=doubleexclaimationmark;exclamation question mark=exclaimationquestionmark
red question mark=blackquestionmark;white exclamation mark=whiteexclaimationmark
red exclamation mark=heavyexclaimationmarksymbol;recycling symbol=blackuniversalrecyclingsymbol
check mark button=whiteheavycheckmark;eight-spoked asterisk=eightspokedasterix
eight-pointed star=eightpointedblackstar;input latin uppercase=inputsymbolforlatincapitalletters
input latin lowercase=inputsymbolforlatinsmallletters;a button (blood type)=negativesquaredlatincaptiala
b button (blood type)=negativesquaredlatincaptialb;o button (blood type)=negativesquaredlatincaptialo
p button=negativesquaredlatincapitalletterp;cl button=squaredcl;ng button=squaredng;up! button=squaredup
vs button=squaredvs;circled m=circledlatincapitalletterm;diamond with a dot=diamondshapewithdotinside"""

FX_ICONS = dict(pair.split("=") for pair in _PAIRS.replace("\n", ";").split(";"))
