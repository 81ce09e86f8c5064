/**
 * Load a folder of GeoJSON files into the images of a QuPath project: S1.geojson into the image S1.svs.
 *
 * In QuPath (0.6 or newer): open the project, Automate > Script editor, open this file, Run > Run (not "Run for project").
 * It asks for the folder: the tissue/ of tile_slides, or the geojson/ of detect_slide, detect_mitosis, grade_slide or heatmap.
 * Without a window: QuPath script -p project.qpproj -a /path/to/geojson tools/qupath/import_geojson.groovy
 *
 * What the script loaded before from a folder of the same name is replaced; all other objects stay. Images that are open are
 * changed in their window and saved; images without a file are left as they are.
 */

import qupath.fx.dialogs.FileChoosers
import qupath.lib.io.PathIO
import qupath.lib.scripting.ScriptAttributes

// with -p the command line runs a script once per image, and this one goes through the project by itself
if ((getProperty(ScriptAttributes.BATCH_INDEX) ?: 0) > 0)
    return

def project = getProject()
if (project == null) {
    println 'ERROR: expected an open project, found none; open or create one first'
    return
}
def folder = binding.hasVariable('args') && args ? new File(args[0] as String) : FileChoosers.promptForDirectory('Folder of GeoJSON files', null)
if (folder == null)
    return
def files = (folder.listFiles() ?: []).findAll { it.isFile() && it.name.toLowerCase().endsWith('.geojson') }
        .collectEntries { [it.name.substring(0, it.name.length() - '.geojson'.length()), it] }
if (files.isEmpty()) {
    println "ERROR: ${folder}: expected <slide_id>.geojson files, found none; choose the folder that holds them"
    return
}

// the folder's name and that of the folder above it: geojson alone would not say of which stage
final SOURCE = 'loaded from'
def source = [folder.absoluteFile.parentFile?.name, folder.name].findAll().join('/')
def endings = ~/(?i)(\.ome)?\.(tiff?|btf|tf8|qptiff|svs|ndpi|mrxs|scn|bif|vms|vmu|svslide|czi|dcm|png|jpe?g|bmp|webp|jp2)$/

/** Ids that a slide of the project may have: by its file, for a DICOM series by its folder, and by its name in the project. */
def listIds = { entry ->
    def paths = entry.getURIs().collect { new File(it.path) }
    def names = paths.collect { it.name.toLowerCase().endsWith('.dcm') ? it.parentFile.name : it.name }
    (names + [entry.getOriginalImageName(), entry.getImageName()]).collect { it.replaceFirst(endings, '') }.unique()
}

def current = getProjectEntry()
def used = [] as Set
int images = 0
for (entry in project.getImageList()) {
    def id = listIds(entry).find { files.containsKey(it) }
    if (id == null)
        continue
    used << id
    def isOpen = current != null && entry.getID() == current.getID()
    def imageData = isOpen ? getCurrentImageData() : entry.readImageData()
    try {
        def objects = PathIO.readObjects(files[id])
        objects.each { it.getMetadata().put(SOURCE, source) }
        def hierarchy = imageData.getHierarchy()
        def old = hierarchy.getAllObjects(false).findAll { it.getMetadata()[SOURCE] == source }
        hierarchy.removeObjects(old, true)
        hierarchy.addObjects(objects)
        entry.saveImageData(imageData)
        images++
        println "${entry.getImageName()}: ${objects.size()} objects" + (old ? ", ${old.size()} earlier ones replaced" : '')
    } catch (IOException | RuntimeException error) {
        println "ERROR: ${entry.getImageName()}: ${files[id]} was not loaded: ${error.message}"
    } finally {
        if (!isOpen)
            imageData.getServer().close()
    }
}
project.syncChanges()
def left = files.keySet() - used
println "${images} of ${project.getImageList().size()} images got objects from ${folder}" +
        (left ? "; no image of the project for ${left.take(5).join(', ')}${left.size() > 5 ? ' and ' + (left.size() - 5) + ' more' : ''}" : '')
