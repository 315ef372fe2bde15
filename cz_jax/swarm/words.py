"""The words that a peer's friendly name is put together from: 64 of each kind, so six bits choose one."""

ADJECTIVES = tuple(
    """
    agile amber ample arctic bold brave breezy bright brisk calm candid clever coastal copper cosy curious
    daring deft dusty eager early earnest even fair fleet fluent frank gentle gilded glad golden hardy
    hazel honest humble jolly keen kind lively lucid lunar mellow merry mild modest nimble noble patient
    placid plucky polite proud quick quiet ready rustic silver sleek snowy solid steady sunny tidy vivid
    """.split()
)

NOUNS = tuple(
    """
    acorn anchor anvil arrow atlas basil beacon birch bridge brook candle canyon cedar chalk cinder clover
    cobalt comet compass coral cotton crystal delta ember fern fjord flint garnet ginger glacier granite grove
    harbor hazelnut heather island ivory jasper juniper kettle lantern laurel lichen linen maple marble meadow mint
    nutmeg opal orchard paper pebble pepper prairie quartz ribbon river saffron summit thistle timber valley willow
    """.split()
)

ANIMALS = tuple(
    """
    alpaca badger beaver bison bittern camel caribou condor coyote crane cricket dingo dolphin egret falcon ferret
    finch fox gazelle gecko goose hare hedgehog heron hornet ibex iguana impala jackal jay kestrel koala
    lark lemur lizard llama lynx magpie marmot marten moose newt ocelot orca osprey otter owl panther
    parrot pelican plover puffin quail rabbit raven robin salmon seal sparrow stork swan tapir turtle weasel
    """.split()
)
